"""Pictures of routing decisions."""
