"""Measures of generated clips. They look at pixels only and know nothing of the model that made them."""
