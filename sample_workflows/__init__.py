"""Small real LangGraph apps, each one file with a docstring that says what it shows."""
