"""A page to try out a model: prompts, chats and templates, with every step of the canvas."""
