"""The commands' names, options and help; what they do is in commands/."""
