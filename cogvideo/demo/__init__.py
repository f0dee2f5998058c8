"""The web page: service.py generates clips for several visitors, page.py shows them, server.py serves the page."""
