"""Access: which pages a decode step reads."""
