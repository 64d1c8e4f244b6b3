"""From a public call to a backend: refuse what cannot be right, pick the backend, prepare the call once and run it."""
