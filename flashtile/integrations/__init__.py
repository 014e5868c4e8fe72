"""Other libraries' doors into flashtile, one file each. Nothing here is imported by the rest of the package."""
