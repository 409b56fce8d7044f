"""One TOML file a task (DESIGN section 9). No code lives here."""
