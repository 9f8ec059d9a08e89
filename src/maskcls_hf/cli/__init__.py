"""The command line, `maskcls`."""
