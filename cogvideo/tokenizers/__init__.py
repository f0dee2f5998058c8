"""Text and image tokenizers, which share one vocabulary. Import the submodules; importing the package stays cheap."""
