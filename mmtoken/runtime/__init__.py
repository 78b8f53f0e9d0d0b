"""State that belongs to a context, never to the process: switches, collectors, records."""
