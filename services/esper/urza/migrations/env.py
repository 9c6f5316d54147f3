"""Environment in which alembic runs the revisions: on the connection that it was given, in that one's transaction."""

from alembic import context

from esper.urza.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # SQLite alters a table by writing it anew.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
