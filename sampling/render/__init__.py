"""Show a recording: as a page, an animation or a picture."""
