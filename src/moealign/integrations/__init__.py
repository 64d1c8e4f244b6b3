"""Hooks into other libraries; each is installed by name and never on import."""
