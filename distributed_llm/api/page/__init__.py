"""The web page: the files that were built from `web/`, and the routes that serve them."""

from distributed_llm.api.page.files import page_routes

__all__ = ["page_routes"]
