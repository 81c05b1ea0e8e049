"""The commands, one file each: options, one library call, render. cli.py loads a file when its command is named."""
