"""The web page: studio.py makes clips for many visitors, page.py shows them, serve.py is the server."""
