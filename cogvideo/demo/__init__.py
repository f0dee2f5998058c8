"""The web page, `cogvideo demo`: studio.py makes clips for many visitors, page.py shows them. Import the submodules."""
