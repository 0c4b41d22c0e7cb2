"""One self-contained HTML page from run directories, which are only read."""
