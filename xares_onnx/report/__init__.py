"""Results for people: in a terminal, on a build server, as a page, a document or a table."""
