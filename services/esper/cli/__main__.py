"""`python -m esper.cli` is the `esper` command."""

from esper.cli.main import app

if __name__ == "__main__":
    app(prog_name="esper")
