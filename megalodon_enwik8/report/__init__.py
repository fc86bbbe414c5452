"""From run folders to the tables and pictures of a page: `python -m megalodon_enwik8.report`."""
