"""The run directory: sealed weights, records and tables on any file system, and feature files in local scratch."""
