"""Who may connect, and what for: machines that are enrolled, and tokens by which others enrol."""
