"""What a smaller cache costs and gains: quality, tasks, recall, speed, memory, side by side."""
