"""One gradient of stiff problems by this library, by CVODES and by diffrax, each in a process of its own."""
