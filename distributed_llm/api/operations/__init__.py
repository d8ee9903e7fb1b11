"""What those who run a cluster ask of the API: how it is, what runs, and what it should do."""
