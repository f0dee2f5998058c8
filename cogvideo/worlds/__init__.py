"""Made worlds: captioned clips whose truth is known."""
