// A static program that maps a file as Go programs do, by system calls of its
// own.
package main

import (
	"bufio"
	"fmt"
	"os"
	"syscall"
)

func main() {
	file, err := os.OpenFile(os.Args[1], os.O_RDWR, 0)
	if err != nil {
		fmt.Println(err)
		return
	}
	info, _ := file.Stat()
	protection := syscall.PROT_READ | syscall.PROT_WRITE
	memory, err := syscall.Mmap(int(file.Fd()), 0, int(info.Size()), protection, syscall.MAP_SHARED)
	if err != nil {
		fmt.Println(err)
		return
	}
	file.Close()
	fmt.Println("mapped")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		for at := 0; at < len(memory); at += 4096 {
			memory[at]++
		}
		fmt.Println("alive")
	}
	syscall.Munmap(memory)
}
