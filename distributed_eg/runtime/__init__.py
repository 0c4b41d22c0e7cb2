"""Where stages run: worker actors on Ray, or this process; the only room that knows Ray."""
