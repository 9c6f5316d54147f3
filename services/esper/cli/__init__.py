"""The `esper` command, and the one place that knows every service: settings of all, `esper up`, `esper serve`."""
