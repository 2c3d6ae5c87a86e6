"""From records to batches: sources, curation, tokenizer, templates, and one stream for each kind."""
