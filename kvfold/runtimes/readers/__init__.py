"""Which of the stored tokens a decode step reads: one reader per file, named in plans."""
