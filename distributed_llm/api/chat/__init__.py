"""A turn of a conversation, in whatever dialect: what is asked, and the answer in its parts."""
