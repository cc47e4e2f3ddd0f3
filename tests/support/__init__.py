"""What several test files use; none of them imports from another."""
