"""What a reader would otherwise copy: scripts written for this comparison, each as its users run it."""
