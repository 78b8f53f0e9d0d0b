"""Pictures of which tokens a network chooses."""
