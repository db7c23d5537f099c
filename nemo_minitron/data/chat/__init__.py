"""Converting public files of chats, preferences and ratings to checked rows and to training text."""
