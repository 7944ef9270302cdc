"""What the tokens of a prompt are worth to the heads that store them: one scorer per file, named in plans."""
