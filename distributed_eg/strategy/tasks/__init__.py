"""From an experience to what is shipped as a task, and what tells its data and settings from another's."""
