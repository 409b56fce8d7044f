"""Who trains, selects and is tested in a task, and how its predictions become a score with an interval."""
