"""What every request passes before a route sees it. Pure ASGI middleware, one concern a module."""
