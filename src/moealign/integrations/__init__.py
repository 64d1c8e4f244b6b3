"""Drop-ins for other libraries.  Importing one changes nothing; ``install()`` does."""
