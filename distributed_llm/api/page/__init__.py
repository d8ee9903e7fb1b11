"""The web page: the files that were built from `web/`, and the routes that serve them."""
