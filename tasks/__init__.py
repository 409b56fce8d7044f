"""One TOML file per task. No code lives here."""
