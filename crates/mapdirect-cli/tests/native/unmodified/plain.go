// A static program that maps a file, as its runtime does it: system calls of
// its own, from any of its threads.
package main

import (
	"bufio"
	"fmt"
	"os"
	"syscall"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func word(err error) string {
	if err == nil {
		return "ok"
	}
	if err == syscall.ETXTBSY {
		return "refused"
	}
	check(err)
	return ""
}

func main() {
	file, err := os.OpenFile(os.Args[1]+"/plain", os.O_RDWR, 0)
	check(err)
	const length = 1 << 20
	memory, err := syscall.Mmap(int(file.Fd()), 0, length,
		syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	check(err)
	fmt.Println("ready")
	_, err = bufio.NewReader(os.Stdin).ReadString('\n')
	check(err)
	for at, value := range memory {
		if value != byte(at) {
			fmt.Fprintln(os.Stderr, "wrong at", at)
			os.Exit(1)
		}
	}
	memory[5000] = 1
	_, err = syscall.Pwrite(int(file.Fd()), make([]byte, 8192), length)
	grow := word(err)
	check(syscall.Munmap(memory))
	cut := word(syscall.Ftruncate(int(file.Fd()), 4096))
	fmt.Printf("done grow=%s cut=%s\n", grow, cut)
}
