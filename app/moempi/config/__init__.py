"""What the user says: the job file and the model's architecture. Frozen, validated, pure."""
