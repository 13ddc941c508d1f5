"""SQuAD's format, the generated corpus, downloads."""
