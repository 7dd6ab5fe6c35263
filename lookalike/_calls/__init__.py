"""One function for each call of the API, a module for each service: how requests are built and responses parsed.

Nothing here sends anything: `_methods.py` turns these functions into methods of both clients.
"""
