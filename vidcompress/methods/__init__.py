"""One file per method. The file's name, the method's name and configs/<name>.yaml agree; the folder is the list."""
