"""Chats, preferences and ratings: public files -> checked rows -> training text."""
