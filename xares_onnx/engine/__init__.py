"""Jobs, the order in which they run, and what runs them: processes of this machine, or a cluster."""
