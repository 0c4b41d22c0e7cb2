"""One script for each kind of user, and a notebook: what a first hour with the package looks like."""
