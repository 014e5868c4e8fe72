"""What only a GPU shows. Collected only where there is one."""
